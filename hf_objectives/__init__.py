"""hf_objectives: exact training objectives for the Hugging Face stack."""

__version__ = "0.1.0"
