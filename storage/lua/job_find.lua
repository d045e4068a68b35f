-- Find the jobs whose IDs begin with a text.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] how they begin
-- ARGV[2] how many at most
-- return  their IDs, newest first
-- include: job
local prefix, start, most, found = KEYS[1], ARGV[1], tonumber(ARGV[2]), {}
for _, id in ipairs(redis.call('ZREVRANGE', prefix .. ':jobs', 0, -1)) do
  if #found == most then
    break
  end
  -- The index may still hold what has expired.
  if string.sub(id, 1, #start) == start and redis.call('EXISTS', job_key(prefix, id)) == 1 then
    found[#found + 1] = id
  end
end
return found
