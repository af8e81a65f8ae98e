"""What is computed and drawn from models and runs; free of TensorFlow."""
