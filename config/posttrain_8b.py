# Progressive training (Yano et al.), Appendix E: fine-tuning of the 8B family on UltraChat-200k at
# a learning rate of 3e-5, then DPO on UltraFeedback at 5e-7, as in Meng et al. (batch size 128, one
# epoch, 10% warmup; their sequences have 2,048 tokens, ours the 1,024 of the models' context).
#   python data/prepare.py ultrachat
#   python data/prepare.py ultrafeedback
#   torchrun --standalone --nproc_per_node=8 train.py config/posttrain_8b.py
method = 'posttrain'
models = tuple(f'out/progressive_8b/{size}' for size in ('1b', '2b', '4b', '8b'))
data = 'ultrachat'
preferences = 'ultrafeedback'

block_size = 1024
batch_size = 128
sft_learning_rate = 3e-5
dpo_learning_rate = 5e-7
beta = 0.1  # ours: the paper names none
micro_batch_size = 2  # answers, then pairs: few, as DPO keeps the logits of whole sequences
warmup = 0.1
schedule = 'cosine'
min_lr_fraction = 0.0
