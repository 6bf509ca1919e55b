"""Other trainers' scripts and arguments, read and written anew as configurations of this package."""
