"""An HTTP server that speaks the OpenAI API, over one of several engines. Import its modules; they need `[serve]`."""
