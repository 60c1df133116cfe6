"""The comparison: what every way of weighting, choosing and making teachers is worth to the same student.

`python -m eekd.compare` trains and evaluates METHODS. Of one seed, every student starts from the same weights and
sees the same images in the same order. One ordinary teacher keeps a snapshot at the end of every stage that any method
asks for, so that methods share it; students read them from its logit bank.

    OUT/
      settings.json           format, config, views, fingerprint of the data: what no later call may change
      seed-S/                 of one process at a time
        ordinary/ cyclic/     a teacher's run folder (eekd.train.run_folder) and, in it, bank/ and teacher.json
        sed-1/ sed-2/ …       the other independently trained teachers, with seeds S + 1000, S + 2000, …
        sed/                  the finished teachers, the ordinary one first, as one ensemble, and its bank/
        soup/                 the mean of the ordinary teacher's last weights (eekd.compare.soup), and its bank/
        students/METHOD/      a student's folder and cell.json: format, method, epochs, seconds, threads
      study.json study.md *.svg         made from all finished cells (eekd.compare.study, eekd.compare.page)

teacher.json: format, seconds of training, threads, epochs and the ensemble of the teacher.snapshots stage ends.
A folder named *.partial is unfinished work, which the next call does again.
"""
