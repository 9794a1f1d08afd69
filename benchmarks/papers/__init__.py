"""The four papers, reproduced: every figure and table as a command, every claim measured."""
