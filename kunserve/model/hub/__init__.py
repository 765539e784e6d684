"""Models of the Hugging Face Hub: fetched, checked, explained when that fails."""
