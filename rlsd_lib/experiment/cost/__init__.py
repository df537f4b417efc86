"""What a step costs: by arithmetic (`plan`), and measured beside TRL's own trainers (`bench`)."""
