-- Read the newest jobs, newest first.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] how many at most
-- return  a list of jobs as lib/job reads them
-- include: time
-- include: job
local prefix, now, found = KEYS[1], now_ms(), {}
for _, id in ipairs(redis.call('ZREVRANGE', prefix .. ':jobs', 0, tonumber(ARGV[1]) - 1)) do
  local job = job_read(prefix, id, now)
  if job then
    found[#found + 1] = job
  end
end
return found
