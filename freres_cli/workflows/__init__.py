"""What each verb does, from what the pipeline opens; nothing here prints."""
