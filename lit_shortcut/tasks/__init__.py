"""LightningModules: batch in, pure loss, log, return."""
