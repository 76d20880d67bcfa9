"""Pictures with phrases and pictures in boxes (Li et al., 2023, "GLIGEN: Open-set grounded text-to-image generation")."""
