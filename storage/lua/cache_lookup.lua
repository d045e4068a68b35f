-- Find the records under any of some cache keys.
--
-- KEYS[1]  prefix of the farm's keys
-- ARGV[1]  seconds for which keys and records are kept without being used
-- ARGV[2…] keys
-- return   a list of {record ID, result, when it was published (microseconds)}, each record once
local prefix, kept_s, seen, found = KEYS[1], ARGV[1], {}, {}
for i = 2, #ARGV do
  local key = prefix .. ':key:' .. ARGV[i]
  local ids = redis.call('ZRANGE', key, 0, -1)
  if #ids > 0 then
    redis.call('EXPIRE', key, kept_s)
  end
  for _, id in ipairs(ids) do
    if not seen[id] then
      local record = prefix .. ':record:' .. id
      local fields = redis.call('HMGET', record, 'result', 'published')
      if fields[1] then
        seen[id] = true
        redis.call('EXPIRE', record, kept_s)
        found[#found + 1] = {id, fields[1], fields[2]}
      else
        redis.call('ZREM', key, id) -- it was forgotten
      end
    end
  end
end
return found
