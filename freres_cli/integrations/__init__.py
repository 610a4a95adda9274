"""freres inside other programs: each file is loaded by the program that it is for."""
