"""What the rows of a monitor can hold, one measure a file."""
