"""The one training loop, and the run folder it writes.

    RUN/
      config.json             every setting of the run (eekd.config.Config); --config RUN/config.json runs it again
      environment.json        format, command, commit, versions, device, threads, started, data
                              (data: name, fingerprint, classes, train, val, test: the last three are counts)
      summary.json            format, seconds, rows: the final table (below); absent until the run has ended
      teacher/                absent when config.json names a teacher_run, whose RUN/teacher is then meant
        manifest.json *.safetensors      the M snapshots (eekd.snapshots)
        metrics.jsonl metrics.csv        a line per epoch (below)
        snapshots.json                   what the snapshots know (below)
      students/WEIGHTING/     one folder per student: ce, last, uniform, attention, ...
        student.safetensors              weights at the end of the last epoch
        student.json                     provenance (below); written last, so it marks a finished student
        attention.safetensors            the attention's own weights, where the weighting is attention
        metrics.jsonl metrics.csv
      **/events.out.tfevents.*           TensorBoard events, only when asked for

metrics.jsonl has one object per epoch; metrics.csv the same, a list spread over columns (weights_1, weights_2, ...):

    epoch, step             from 1; optimiser steps taken so far
    lr                      at the last step of the epoch
    train_loss              mean of what was minimised (a student's includes the attention's loss)
    train_accuracy          of the network in training mode, on augmented images
    val_loss, val_accuracy  cross-entropy and accuracy on the validation images
    seconds                 of training in the epoch, validation left out
    seconds_teacher         forward of the snapshots (0 where there are none)
    seconds_forward         forward of the network being trained
    seconds_backward        loss, backward and optimiser step; what remains of `seconds` is the wait for data

and for a student with snapshots also:

    weights                 list of M: mean weight of each snapshot in training
    weight_entropy          mean over samples of the entropy of the weights, in nats (uniform: log M)
    train_attention_loss    -log p_y of the fused target at the student's temperature
    val_target_nll, val_target_nll_uniform   the same on validation images, under these weights and under 1/M each
    val_kd_loss, val_kd_loss_uniform         alpha CE + (1 - alpha) temperature^2 KL to either target

snapshots.json holds {"val": DIAGNOSIS, "test": DIAGNOSIS}; a DIAGNOSIS has `members`, a list of M + 1 objects
(the snapshots in order, then their ensemble: the uniform mean of probabilities), each with `name`, `accuracy`,
`nll`, `ece` and `reliability` (lists `confidence`, `accuracy`, `count` over 15 equal bins of confidence;
null where a bin is empty), all at temperature 1, and `disagreement`: M x M, the fraction of images on which two
snapshots predict different classes.

student.json: format, weighting, spec (eekd.models.build), file, sha256, attention_sha256 or null, loss (settings),
seed, commit, val and test ({loss, accuracy}), seconds_per_epoch, teacher: null for ce, or run, spec and
snapshots (file, sha256, step of each snapshot that taught).

A row of summary.json: kind (teacher | snapshot | ensemble | student), name, model, parameters, epochs,
val_accuracy, test_accuracy, gain (over the ce student, test accuracy; null where there is none or for other
kinds), seconds_per_epoch (null for snapshots and the ensemble). Accuracies are fractions.

Test images are touched once, at the end of a phase, and what is reported is the last epoch.
"""
