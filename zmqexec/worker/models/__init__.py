"""Model families, one file each, with the layers and weight loading they share. Runs in: worker."""
