"""The commands of `listen`: one module with a `main` for each, which reads `sys.argv`."""
