"""What a trained model becomes: a classifier, and a program in a file."""
