"""Tables, figures and verdicts, made from run directories alone."""
