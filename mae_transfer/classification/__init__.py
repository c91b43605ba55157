"""Classification with a pretrained encoder: fine-tuning, partial fine-tuning, linear probe and k-nearest neighbours."""
