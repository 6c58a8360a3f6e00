"""Every setting of a run; the defaults are the released EMANet recipe.

Change a line here, or override it: `python train.py N_LAYERS=50 STRIDE=16 LR=0.007`.
This file holds literals only: int, float, bool, str or a flat tuple of them; 0 means
off and '' means none or "the data set's own".
"""
# -- the experiment
RECIPE = ''                 # a name in recipes.py, applied over this file
SEED = 1                    # of the initial weights, the samples and the dropout
LOG_DIR = 'logdir'          # folder: everything that a run writes
RESUME = ''                 # 'force': go on although settings have changed

# -- the data
DATASET = 'voc'             # a name in DATASETS of recipes.py
DATA_ROOT = ''              # folder; '' is the data set's own, below data/
TRAIN_SPLIT = ''            # split to train on; '' is the data set's own (trainaug)
VAL_SPLIT = ''              # split to evaluate on; '' is the data set's own (val)
CROP_SIZE = 513             # pixels, height of a training crop
CROP_WIDTH = 0              # pixels, its width; 0 is CROP_SIZE
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)  # one is drawn for each sample
USE_FLIP = True             # flip every other sample, left to right
MEAN = (0.485, 0.456, 0.406)  # of the pixels in 0..1, red green blue
STD = (0.229, 0.224, 0.225)  # of the pixels likewise, the standard deviation

# -- the backbone
N_LAYERS = 101              # 18, 34, 50, 101 or 152
STEM = 'auto'               # deep or v1c (three 3x3), plain (one 7x7), auto (models/)
STRIDE = 8                  # pixels of the input per feature, 8 or 16
EVAL_STRIDE = 0             # the same at evaluation; 0 is STRIDE
MULTI_GRID = (1, 2, 4)      # dilation factors of the blocks of layer4
PRETRAINED = 'auto'         # auto, none, a torchvision name (IMAGENET1K_V1) or a file
MODEL_DIR = 'models'        # folder of the ImageNet weights
INIT_FROM = ''              # checkpoint of a whole network to start from
BN_MOM = 3e-4               # share of the new batch in the running statistics

# -- the head and its EM attention unit
HEAD = 'ema'                # ema_mmseg fcn deeplabv3 deeplabv3plus psanet nonlocal a2
HEAD_CHANNELS = 512         # channels of fc0 and of the unit; of PSANet's attention
FC1_CHANNELS = 256          # of fc1 and DeepLab's branches; 0: no fc1, as in Table 1
DROPOUT = 0.1               # share of the last features' channels dropped in training
PSA_GRID = (33, 33)         # rows and columns that PSANet's attention works on
ALIGN_CORNERS = True        # of the logits' upsampling; False: mmsegmentation's
N_BASES = 64                # K
STAGE_NUM = 3               # T, EM iterations while training
EVAL_STAGE_NUM = 0          # T at evaluation; 0 is STAGE_NUM
EM_LAMBDA = 1.0             # lambda, sharpness of the responsibilities
EM_KERNEL = 'exp_dot'       # exp_dot, dot or euclidean (negative squared: RBF)
EM_NORM = 'l2'              # l2, layer_norm or none, of each basis
EM_UPDATE = 'moving_average'  # moving_average, back_propagation or never
EM_GRADIENT = 'none'        # through the iterations: none, last or full
EM_MOM = 0.9                # alpha, share of the old bases in the moving average
EM_RENORM = False           # normalise the batch mean before it is averaged in
EM_CONV1 = 'auto'           # fixed, trained, absent; auto: trained if it has a gradient

# -- the optimisation
BATCH_SIZE = 16             # images of one step, over all ranks and ACCUMULATE
ACCUMULATE = 1              # parts that a batch is computed in: less memory
ITER_MAX = 30000            # steps
LR = 0.009                  # learning rate at the start
LR_POWER = 0.9              # of (1 - step / ITER_MAX): poly_lr in train.py
LR_END = 0.0                # the learning rate falls from LR to this
LR_EVERY = 10               # steps between refreshes of the learning rate
LR_MOM = 0.9                # momentum of SGD
BIAS_LR = 2.0               # times LR for every bias
WEIGHT_DECAY = 1e-4         # on the convolutions' weights only
DECAY_ALL = False           # on batch norms and biases too
LOSS_NORM = 'all'           # divide by all pixels of the batch, or by the valid ones
CLASS_WEIGHTS = (1.0,)      # of the loss, one a class; a single one is for all
OHEM_KEPT = 0.0             # learn this share of an image's pixels, the hardest; 0: all
OHEM_BELOW = 0.0            # or those with a true-class probability below this; 0: all
OHEM_MIN = 100000           # pixels of an image that OHEM keeps at least
AUX_WEIGHT = 0.0            # of the loss of an FCN head on layer3; 0 is without
CLIP_GRAD = 0.0             # largest norm of the gradient; 0 is off

# -- the machine: affects speed and memory; PRECISION also changes rounding
DEVICE = 'auto'             # auto, cpu, mps, cuda (all of them), cuda:1 or cuda:0,2
RANKS = 0                   # processes that share the work; 0: one a GPU, or one
PRECISION = 'auto'          # fp32, bf16, fp16; auto is bf16 where the device has it
CHANNELS_LAST = True        # memory order of the convolutions' tensors
COMPILE = False             # torch.compile the network
RECOMPUTE = False           # activation checkpointing in the backbone: less memory
N_WORKERS = 4               # loader processes; 0 loads in the main one

# -- the evaluation (see EVAL_STRIDE, EVAL_STAGE_NUM and VAL_SPLIT too)
EVAL_MODE = 'single'        # single scale, or multi: the mean over EVAL_SCALES
EVAL_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
EVAL_FLIP = False           # average with the flipped image
EVAL_WINDOW = (0,)          # pixels of sliding windows: height,width or one; 0: whole
EVAL_STEP = 0.67            # of a window's side, from one window to the next at most
EVAL_BATCH = 4              # images of like size, or windows, computed together
EVAL_EVERY = 0              # steps between evaluations while training; 0 is off
EVAL_IMAGES = 0             # evaluate the first N images of the split; 0 is all
CHECKPOINT = ''             # file, or several with commas; '' is the last in LOG_DIR

# -- the log and the checkpoints
LOG_EVERY = 10              # steps between log lines
IMAGE_EVERY = 500           # steps between pictures in TensorBoard; 0 is off
ITER_SAVE = 2000            # steps between step_N.pth; latest.pth 10 times as often
KEEP = 2                    # step_N.pth that are kept
