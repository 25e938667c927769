"""How far a pattern's draws are from independent dropout: closed forms, samples, the report and its picture."""
