"""Examples on pretrained weights that packages carry."""
