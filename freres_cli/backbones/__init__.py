"""frames -> latents, and tokens -> answer, with the classes of transformers."""
