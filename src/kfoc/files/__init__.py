"""Files that are whole or not there, and what is written in them."""
