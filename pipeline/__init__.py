"""What happens, in order: from a trained model to a verified artifact and its report."""
