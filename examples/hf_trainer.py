"""SPO in Hugging Face's Trainer, on rows with TRL's columns: prompt, chosen, rejected.

python examples/hf_trainer.py --model NAME_OR_FOLDER --steps 20
"""

import torch
from plain_pytorch import ADAPTER_RATE, BACKBONE_RATE, PAIRS, arguments

from spo_ray.hf import SPOConfig, SPOTrainer


def main() -> None:
    """Train on the pairs of plain_pytorch.py, and save the model with its adapters merged."""
    options = arguments(__doc__)
    args = SPOConfig(
        output_dir="spo-model",
        max_steps=options.steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=BACKBONE_RATE,
        adapter_learning_rate=ADAPTER_RATE,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = SPOTrainer(options.model, args, train_dataset=PAIRS)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
