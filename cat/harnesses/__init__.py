"""A CAT checkpoint in the shape that evaluation harnesses ask for, a file a harness; each is handed to it as it is."""
