"""What passes and planning know of fx graphs: nodes, which operations drop, axis rules, device costs."""
