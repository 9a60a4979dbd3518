# Late-to-Early Training (Zhao et al.), Appendix E, on one of its ten data sets: Japanese vowels.
# Needs requirements-extras.txt; a minute on a CPU.
method = 'timeseries'
size = '64x4'
teacher_size = '32x2'
epochs = 60
teacher_epochs = 120
lambda0 = 0.1
s_stop = 0.5
seeds = 5

batch_size = 16
learning_rate = 1e-3
schedule = 'cosine'
warmup = 0.1
weight_decay = 0.1
