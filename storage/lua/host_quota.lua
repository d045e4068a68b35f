-- Record what a registry says is left for an account's requests of one kind.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] host
-- ARGV[2] kind of requests
-- ARGV[3] account
-- ARGV[4] milliseconds between two requests
-- ARGV[5] milliseconds in which no request is of use
-- ARGV[6] milliseconds after which all is there again, 0: enough is left
-- ARGV[7] requests that are left of what little there is
-- return  nothing
-- include: time
-- include: quota
quota_set(
  KEYS[1], ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7], now_ms())
