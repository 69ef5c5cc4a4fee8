"""What a study starts from: the model, its sites, texts and the device."""
