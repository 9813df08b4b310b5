"""Published weights, converted into folders that transformers loads."""
