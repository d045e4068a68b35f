-- Read a job.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] job ID
-- return  the job as lib/job reads it, or nil
-- include: time
-- include: job
return job_read(KEYS[1], ARGV[1], now_ms())
