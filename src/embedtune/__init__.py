"""Fine-tune text-embedding models: jsonl files in, a sentence-transformers folder out."""
