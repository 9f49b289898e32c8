"""One folder per modality; see docs/adding-a-modality.md."""
