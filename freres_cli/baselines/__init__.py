"""Peers of the method: one small tensor function a file, (latents, frame_seconds, budget_tokens, width) -> tokens."""
