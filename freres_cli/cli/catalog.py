"""Names that completion needs before anything heavy is imported."""

CHECKPOINT_IDS = ("Qwen/Qwen2-VL-2B-Instruct", "Qwen/Qwen2-VL-7B-Instruct")
