-- Make a blob present and end its flight.
--
-- KEYS[1]    prefix of the farm's keys
-- ARGV[1]    key
-- ARGV[2…4]  epoch, fence, token
-- ARGV[5]    object key of the upload
-- ARGV[6]    blob record, payload
-- ARGV[7]    the event, payload
-- ARGV[8]    lease that holds the blob until those who waited hold it themselves
-- ARGV[9]    milliseconds that this lease lives
-- ARGV[10]   its labels, payload
-- ARGV[11]   limits of the audit stream (lib/audit.lua); '' to note nothing
-- ARGV[12]   entry for it, payload
-- return     1, or 0 if it owns no more: then nothing has changed
-- Safe to repeat: an object key is one upload's own, so a blob that is recorded under it was committed by
-- this very call, whose answer was lost.
-- include: time
-- include: lease
-- include: flight
-- include: audit
local prefix, key = KEYS[1], ARGV[1]
local now = now_ms()
local blob = prefix .. ':' .. key
if not flight_is_owner(prefix, key, ARGV[2], ARGV[3], ARGV[4], now) then
  local present = redis.call('GET', blob)
  return present and cmsgpack.unpack(present)[3].key == ARGV[5] and 1 or 0
end
redis.call('SET', blob, ARGV[6])
-- Its uploader was paused for so long that the sweeper took the object for a stray: there still, it may stay.
redis.call('ZREM', prefix .. ':deleting', '- ' .. ARGV[5])
local lease = ARGV[8]
if not lease_is_live(prefix, lease, now) then
  lease_drop(prefix, lease)
  lease_write(prefix, lease, now, now + tonumber(ARGV[9]), ARGV[10])
else
  redis.call('ZADD', prefix .. ':leases', now + tonumber(ARGV[9]), lease)
end
lease_hold(prefix, lease, key)
upload_forget(prefix, key)
redis.call('DEL', flight_key(prefix, key), waiters_key(prefix, key))
flight_settle(prefix, key, ARGV[3], ARGV[7])
audit_note(prefix, ARGV[11], {ARGV[12]}, now)
return 1
