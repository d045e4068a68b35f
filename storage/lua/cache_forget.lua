-- Forget a record, unless its result has been published again since it was looked up.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] record ID
-- ARGV[2] when it was published, microseconds
-- return  1 if this call forgot it, else 0
-- The keys that name it drop it when they are next looked up.
local record = KEYS[1] .. ':record:' .. ARGV[1]
if redis.call('HGET', record, 'published') ~= ARGV[2] then
  return 0
end
return redis.call('DEL', record)
