"""What a sampled step does, and who says when: a loop of one's own, Lightning, Hugging Face's Trainer."""
