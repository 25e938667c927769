"""From a model to rewritten graphs: Dynamo captures, the passes rewrite, draws enter as inputs."""
