"""What LLaMA-Factory makes of conversations: its templates, its way of cutting, and its dataset_info.json."""
