-- Turn a blob lazy again, if what is recorded is still that very upload.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] digest
-- ARGV[2] object key of the upload that was found gone or damaged
-- ARGV[3] why, for people; kept a week
-- ARGV[4] milliseconds until its object may be deleted; '' to leave the object to the sweeper
-- ARGV[5] limits of the audit stream (lib/audit.lua); '' to note nothing
-- ARGV[6] entry for it, payload
-- return  1 if this changed it, else 0
-- include: time
-- include: audit
local blob = KEYS[1] .. ':blob:' .. ARGV[1]
local value = redis.call('GET', blob)
if not value or cmsgpack.unpack(value)[3].key ~= ARGV[2] then
  return 0
end
redis.call('DEL', blob)
redis.call('SET', KEYS[1] .. ':absent:' .. ARGV[1], ARGV[3], 'EX', 604800)
local now = now_ms()
if ARGV[4] ~= '' then
  redis.call('ZADD', KEYS[1] .. ':deleting', now + tonumber(ARGV[4]), ARGV[1] .. ' ' .. ARGV[2])
end
audit_note(KEYS[1], ARGV[5], {ARGV[6]}, now)
return 1
