"""What only a GPU can tell, in minutes: ``make gpu``. It runs on a CPU in miniature."""
