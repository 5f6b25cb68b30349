"""The HTTP server: OpenAI-compatible, any adapter per request, on one engine in a thread of its own.

`app.create_app(...)` makes the application, `run.serve(...)` runs it. `wire` is what goes over the network, `loop` the
thread that steps, `shelf` the library as the engine sees it, `keys` who may do what.
"""
