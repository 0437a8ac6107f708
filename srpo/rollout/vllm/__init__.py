"""The vLLM engine: its process, the protocol to it, and loading weights into its model."""
