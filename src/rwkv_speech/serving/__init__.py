"""A server of transcripts that speaks the API which clients know."""
