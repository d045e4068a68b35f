-- Tell that the driver of an attached job is there; nothing for a detached one, or one that has ended.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] job ID
-- ARGV[2] milliseconds for which it is taken to be
-- return  the job's state, or nil if it is unknown
-- include: time
-- include: job
redis.call('ZADD', attended_key(KEYS[1]), 'XX', now_ms() + tonumber(ARGV[2]), ARGV[1])
return redis.call('HGET', job_key(KEYS[1], ARGV[1]), 'state')
