"""The Hugging Face Hub: model cards, and folders pushed as repos."""
