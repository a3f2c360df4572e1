"""Other runtimes measured beside ours: llama.cpp and OpenVINO, over the same weights, written by the bench itself."""
