"""Utterances from manifests, folders and Hugging Face sets, made into batches."""
