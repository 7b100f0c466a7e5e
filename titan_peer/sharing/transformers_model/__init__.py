"""The model for users of transformers: `titan-peer export` copies these files into the folder of the weights.

They import nothing from titan_peer, so that `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`
works if only torch and transformers are installed.
"""
